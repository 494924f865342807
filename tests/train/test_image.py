"""Image classification: data sets, augmentation, and what the built-in default reaches."""

import pickle
import time

import numpy as np
import pytest
import torch

from fused_ops.train.__main__ import main
from fused_ops.train.image import ImageClassification, ImageConfig
from fused_ops.train.loop import Trainer
from fused_ops.train.vision import torchvision
from tests.train.material import tiny, write_images
from tests.train.runs import CPU, train


def test_digits_are_split_and_only_training_is_augmented(tmp_path):
    recipe = tiny("image", tmp_path)
    assert [len(data) for data in (recipe.train, recipe.valid, recipe.test)] == [1294, 144, 359]
    assert recipe.valid[0][0].shape == (1, 8, 8) and recipe.num_classes == 10
    assert not torch.equal(recipe.train[0][0], recipe.train[0][0])
    assert torch.equal(recipe.valid[0][0], recipe.valid[0][0])
    pixels = torch.stack([image for image, _ in recipe.test])
    assert pixels.mean().abs() < 0.05 and abs(pixels.std() - 1) < 0.05
    other = tiny("image", tmp_path, seed=1)
    assert [label for _, label in other.test] == [label for _, label in recipe.test]


@pytest.mark.parametrize("model", ("cnn", "resnet18"))
def test_a_folder_in_imagenets_layout_trains(model, tmp_path):
    options = {"dataset": "imagefolder", "data_path": write_images(tmp_path / "data"), "model": model}
    recipe = tiny("image", tmp_path, image_size=32, val_split=0.34, batch_size=2, max_steps=1, **options)
    assert [len(data) for data in (recipe.train, recipe.valid, recipe.test)] == [4, 2, 6]
    assert train(recipe).test(tmp_path / "run/best.pt").keys() == {"loss", "accuracy"}


def test_with_a_test_folder_val_is_for_validation(tmp_path):
    write_images(tmp_path / "data", splits=("train", "val"))
    write_images(tmp_path / "data", splits=("test",), count=5)
    recipe = tiny("image", tmp_path, dataset="imagefolder", data_path=tmp_path / "data")
    assert [len(data) for data in (recipe.train, recipe.valid, recipe.test)] == [6, 6, 10]


def write_cifar(folder, count: int = 10):
    """Files in CIFAR-10's layout, with fewer images."""
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    names = [f"cat {i}" for i in range(10)]
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        batch = {"data": np.zeros((count, 3072), np.uint8), "labels": list(range(count)), "label_names": names}
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch))
    return folder


def test_cifar_is_read(tmp_path, monkeypatch):
    path = write_cifar(tmp_path)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    recipe = tiny("image", tmp_path, dataset="cifar10", data_path=path, model="resnet18")
    assert [len(data) for data in (recipe.train, recipe.valid, recipe.test)] == [45, 5, 10]
    assert recipe.valid[0][0].shape == recipe.train[0][0].shape == (3, 32, 32)
    assert recipe.model().conv1.kernel_size == (3, 3)


def refused(capsys, *options: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["image", *options])
    assert capsys.readouterr().out == "" and len(str(stopped.value).splitlines()) == 1
    return str(stopped.value)


def test_data_that_is_not_there_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    path = ("--data-path", "empty")
    assert refused(capsys, "--dataset=cifar10") == "error: data_path must be the folder of cifar10, got None"
    assert "data_path must be a folder that holds cifar-10-batches-py, whole" in refused(
        capsys, "--dataset=cifar10", *path
    )
    assert "data_path must be a folder of train/<class>" in refused(capsys, "--dataset=imagefolder", *path)
    write_cifar(tmp_path / "cut")
    assert "not found or corrupted" in refused(capsys, "--dataset=cifar10", "--data-path=cut")


@pytest.mark.parametrize("workers", (0, 1))
def test_an_image_that_cannot_be_read_is_named(workers, tmp_path, capsys):
    folder = write_images(tmp_path / "data")
    for file in folder.glob("train/*/*"):
        file.write_bytes(file.read_bytes()[:300])
    options = ("--image-size=32", "--val-split=0.34", "--batch-size=2", f"--workers={workers}")
    found = refused(capsys, "--dataset=imagefolder", f"--data-path={folder}", f"--output-dir={tmp_path}/run", *options)
    assert "data_path must be a folder of readable images, got" in found and ".png: " in found


def test_splits_with_other_classes_are_refused(tmp_path, capsys):
    write_images(tmp_path / "data", ("train",))
    folder = write_images(tmp_path / "data", ("val",), classes=("cat", "cow"))
    found = refused(capsys, "--dataset=imagefolder", f"--data-path={folder}")
    assert "data_path must be a folder with the same classes in each split" in found


def test_a_cnn_learns_the_digits(tmp_path):
    """98.5 % and more of the held-out digits, in less than two minutes of two cores."""
    start = time.process_time()
    trainer = Trainer(ImageClassification(ImageConfig(output_dir=tmp_path)), CPU)
    trainer.train()
    assert trainer.test(tmp_path / "best.pt")["accuracy"] >= 0.985
    assert time.process_time() - start < 240
