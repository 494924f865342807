"""Training recipes: `python -m fused_ops.train`, or `run` with a `Recipe` and a `Config` of your own."""


def run(recipe, config) -> dict[str, float]:
    """Train, then measure the best weights on held-out data; these metrics.

    Args:
        recipe: a class, `fused_ops.train.recipe.Recipe`'s.
        config: its options, an instance of `recipe.config_class`.

    Raises:
        ValueError: an option, the data or a checkpoint is not as it has to be.
        OSError: a file cannot be read or written; the last checkpoint is whole.
        FloatingPointError: the loss is not finite.
    """
    from fused_ops.train import parallel
    from fused_ops.train.loop import Trainer

    with parallel.processes(config.device) as device:
        path = config.resume
        if config.sweep and not config.test_only:
            from fused_ops.train.sweep import sweep

            config = sweep(recipe, config, device)
        trainer = Trainer(recipe(config), device)
        if not config.test_only:
            if not config.sweep:
                trainer.train()
            path = config.output_dir / "best.pt"
        found = trainer.test(path)
        if not config.test_only:
            trainer.save_pretrained()
        return found
