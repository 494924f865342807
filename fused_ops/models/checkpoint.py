"""Weights on disk: Hugging Face folders and single files, read whole or not at all.

Layout of a folder: config.json beside model.safetensors or pytorch_model.bin, or beside their shards with an index
(model.safetensors.index.json, pytorch_model.bin.index.json).
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fused_ops.core.errors import ArgumentError

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_LISTED = 20  # keys of one kind that an error names


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by its key, on the CPU.

    Args:
        path: a Hugging Face folder, sharded or not, or a file: .safetensors, else what `torch.save` wrote of a state
            dict (read with weights_only=True).

    Raises:
        ValueError: there is no checkpoint, or it is truncated, lacks a shard or holds more than tensors.
    """
    path = Path(path)
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        raise ArgumentError("path", "a checkpoint's folder or file", f"{path}, which does not exist")
    for name in _WEIGHTS:
        if (path / name).is_file():
            return _read_file(path / name)
        if (path / f"{name}.index.json").is_file():
            return _read_shards(path, f"{name}.index.json")
    names = " or ".join((*_WEIGHTS, *(f"{name}.index.json" for name in _WEIGHTS)))
    raise ArgumentError("path", f"a folder with {names}", f"{path}, which holds {_listed(os.listdir(path))}")


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        library = _safetensors()
        try:
            return library.torch.load_file(file)
        except (library.SafetensorError, OSError) as error:
            raise ArgumentError("path", "a whole safetensors file", f"{file}: {error}") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn pickle raises whatever it likes
        code = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's message goes on with how to run it
        reason = f"it asks for {code[1]}" if code else str(error).strip().partition(". ")[0] or type(error).__name__
        raise ArgumentError("path", "a whole file of nothing but tensors", f"{file}: {reason}") from error
    if not isinstance(state, dict):
        raise ArgumentError("path", "a file that holds a state dict", f"{file}, a {type(state).__name__}")
    return check_state("path", state, f"{file} with ")


def check_state(argument: str, state: Mapping[str, Tensor], source: str = "") -> dict[str, Tensor]:
    """A copy of `state`, which holds tensors and nothing else."""
    odd = [f"{key}: {type(value).__name__}" for key, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ArgumentError(argument, "a state dict, tensors by key", f"{source}{_listed(odd)}")
    return dict(state)


def _read_shards(folder: Path, index: str) -> dict[str, Tensor]:
    places = _read_json(folder / index).get("weight_map")
    if not isinstance(places, dict):
        raise ArgumentError("path", "a folder whose index has a weight_map", f"{folder / index} without one")
    shards = sorted({str(name) for name in places.values()})
    lost = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
    if lost:
        raise ArgumentError("path", f"a folder with every shard of {index}", f"{folder} without {_listed(lost)}")
    state: dict[str, Tensor] = {}
    for name in shards:
        state.update(_read_file(folder / name))
    absent = places.keys() - state.keys()
    if absent:
        raise ArgumentError("path", f"a folder with every tensor of {index}", f"{folder} without {_listed(absent)}")
    return state


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ArgumentError("path", f"a folder with {file.name}", f"{file.parent} without it")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError("path", f"a folder with a readable {file.name}", f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise ArgumentError("path", f"a folder whose {file.name} is an object", f"{file}, a {type(content).__name__}")
    return content


def load_into(
    model: nn.Module,
    state: dict[str, Tensor],
    ignore: Iterable[str] = (),
    fresh: Iterable[str] = (),
    argument: str = "state",
) -> None:
    """Copy `state` into the model's parameters and buffers, in their dtype and on their device: all of it or nothing.

    Args:
        ignore: shell patterns of keys that the state may have beyond the model's.
        fresh: shell patterns of the model's keys that the state need not have; those keep their values.
        argument: what errors call the state.

    A key whose tensor the model shares with another key (tied weights) need not be there either.

    Raises:
        ValueError: keys are missing or unexpected, shapes differ, or tied weights do: one error lists them all.
    """
    own = model.state_dict(keep_vars=True)
    unexpected = [key for key in state if key not in own and not _matches(key, ignore)]
    holders: dict[int, str] = {}
    differing = []
    for key in (key for key in own if key in state):
        twin = holders.setdefault(id(own[key]), key)
        if twin != key and not torch.equal(state[twin], state[key]):
            differing.append(f"{twin} and {key}")
    missing = [key for key, tensor in own.items() if id(tensor) not in holders and not _matches(key, fresh)]
    unlike = [
        f"{key} {_described(state[key])} instead of {_described(tensor)}"
        for key, tensor in own.items()
        if key in state and _described(state[key]) != _described(tensor)
    ]
    complaints = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape or kind": unlike,
        "one tensor in the model but not here": differing,
    }
    if any(complaints.values()):
        found = "; ".join(f"{len(keys)} {what}: {_listed(keys)}" for what, keys in complaints.items() if keys)
        raise ArgumentError(argument, f"the weights of a {type(model).__name__}", found)
    with torch.no_grad():
        for key in holders.values():
            own[key].copy_(state[key])


def _described(tensor: Tensor) -> str:
    """What has to agree: the shape, the dtype unless it is a floating one, that the values lie there one by one."""
    dtype = "" if tensor.is_floating_point() else f" {tensor.dtype}"
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    return f"{tuple(tensor.shape)}{dtype}{layout}{' without values' if tensor.is_meta else ''}"


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "nothing") + more


def write_state(file: str | os.PathLike, state: dict[str, Tensor]) -> None:
    """Write `state` as safetensors; of keys that share one tensor, the first is written, as transformers does."""
    kept: dict[tuple, str] = {}
    for key, tensor in state.items():
        kept.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (key,), key)
    tensors = {key: state[key].detach().cpu().contiguous() for key in kept.values()}
    scratch = Path(file).with_suffix(".partial")
    try:
        _safetensors().torch.save_file(tensors, scratch, metadata={"format": "pt"})
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a .safetensors file needs safetensors: pip install safetensors") from error
    return safetensors


class Pretrained(nn.Module):
    """A model that lives in a Hugging Face folder, under Hugging Face's names of configuration fields and weights.

    Attributes:
        config_class: a dataclass whose fields are those of config.json.
        model_type, architecture: what config.json calls the family and this model.
        ignored: shell patterns of keys in a checkpoint that this model has no use for.
        fixed: fields of config.json that ask for something else than this model unless they have these values.
    """

    config_class: ClassVar[type]
    model_type: ClassVar[str]
    architecture: ClassVar[str]
    ignored: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *, fresh: Iterable[str] = (), **changes) -> "Pretrained":
        """The model in a Hugging Face folder, in eval mode; nothing is downloaded.

        Args:
            path: a folder with config.json and model.safetensors or pytorch_model.bin, or their shards.
            fresh: shell patterns of weights that the checkpoint need not have, say ("classifier.*",) for a head to
                be trained; they keep their random values.
            changes: fields of the configuration that replace the folder's.

        Raises:
            ValueError: the folder is incomplete, truncated or holds another architecture; keys are missing,
                unexpected or of another shape (the error lists them).
        """
        found = cls.read_config(path)
        config = replace(cls.config_class(**found), **changes)
        state = cls.renamed(read_state(path))
        model = cls(config)
        load_into(model, state, cls.ignored, fresh, argument="path")
        return model.eval()

    @classmethod
    def read_config(cls, path: str | os.PathLike) -> dict[str, Any]:
        """The folder's config.json, reduced to the fields of `config_class`."""
        if not Path(path).is_dir():
            raise ArgumentError("path", "a folder with config.json", f"{path}, which is none")
        found = _read_json(Path(path) / "config.json")
        if found.get("model_type") != cls.model_type:
            wanted, got = f"a {cls.__name__} checkpoint (model_type {cls.model_type!r})", found.get("model_type")
            raise ArgumentError("path", wanted, f"{path} of model_type {got!r}")
        for name, value in cls.fixed.items():
            if found.get(name, value) != value:
                raise ArgumentError("path", f"a checkpoint with {name} {value!r}", f"{path} with {found[name]!r}")
        names = {field.name for field in fields(cls.config_class)}
        if isinstance(found.get("id2label"), dict) and "num_labels" in names:
            found["num_labels"] = len(found["id2label"])
        return {name: value for name, value in found.items() if name in names}

    @classmethod
    def renamed(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors under this model's keys."""
        return state

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write config.json and model.safetensors into a folder (made if need be), as transformers reads them."""
        folder = Path(path)
        if folder.is_file():
            raise ArgumentError("path", "a folder", f"{folder}, a file")
        folder.mkdir(parents=True, exist_ok=True)
        unset = {
            field.name for field in fields(self.config) if field.default is getattr(self.config, field.name) is None
        }
        config = {name: value for name, value in asdict(self.config).items() if name not in unset}
        config = {"architectures": [self.architecture], "model_type": self.model_type, **config}
        write_state(folder / "model.safetensors", self.state_dict())
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
