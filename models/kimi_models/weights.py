"""Reads and writes safetensors in the published names. Nothing in a file is trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from kimi_models.config import KimiLinearConfig
from kimi_models.names import Weight, canonical_name, weight_table

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Buffers that old checkpoints carry and that NoPE attention has no use for.
_IGNORED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


class WeightError(ValueError):
    """Weights that do not fit the config. The message names the tensor, what is wrong and the fix."""


def load_weights(model: nn.Module, folder: str | os.PathLike[str], config: KimiLinearConfig) -> None:
    """Fills `model` (a `kimi_models.reference` model on a real device) from the safetensors in `folder`.

    Every published tensor must be there once, with its shape and a floating dtype, and be finite. Raises
    WeightError otherwise, before any parameter is changed by a tensor that is wrong.
    """
    table = weight_table(config)
    params = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in read_weights(folder, config):
            target = param_slice(params, table[name])
            target.copy_(tensor.reshape(target.shape))


def read_weights(
    folder: str | os.PathLike[str], config: KimiLinearConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (published name, tensor) for every tensor, as stored, after the checks of `load_weights`.

    Names, shapes and dtypes of the whole checkpoint are checked before the first tensor is read.
    """
    table = weight_table(config)
    files = _files(Path(folder))
    found: dict[str, Path] = {}
    for file in files:
        with _open(file) as f:
            for raw in f.keys():  # noqa: SIM118 - not a dict
                name = canonical_name(raw, config)
                if name.endswith(_IGNORED):
                    continue
                if name in found:
                    raise WeightError(
                        f"{name} is in {found[name].name} and again in {file.name}: remove one of the two"
                    )
                found[name] = file
                if name in table:
                    _check_header(table[name], f.get_slice(raw), file)
    _check_names(found.keys(), table, Path(folder))
    for file in files:
        with _open(file) as f:
            for raw in f.keys():  # noqa: SIM118
                name = canonical_name(raw, config)
                if name not in table:
                    continue
                tensor = f.get_tensor(raw)
                _check_finite(name, tensor, file)
                yield name, tensor.reshape(table[name].shape)


def save_weights(
    model: nn.Module,
    folder: str | os.PathLike[str],
    config: KimiLinearConfig,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[Path]:
    """Writes the published names: one file, or numbered files and an index above `max_file_bytes`.

    `dtype` (default: the config's) is that of all tensors but those that are published in float32.
    """
    dtype = dtype or getattr(torch, config.dtype)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for old in (*path.glob("*.safetensors"), path / INDEX_NAME):
        old.unlink(missing_ok=True)
    params = dict(model.named_parameters()) | dict(model.named_buffers())
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, weight in weight_table(config).items():
        tensor = param_slice(params, weight).detach().reshape(weight.shape)
        tensor = tensor.to(
            "cpu", torch.float32 if weight.fp32 and dtype != torch.float64 else dtype, copy=True
        )
        _check_finite(name, tensor, path / SINGLE_NAME)
        if size and size + tensor.nbytes > max_file_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    if len(parts) == 1:
        files = [path / SINGLE_NAME]
    else:
        files = [path / f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file.name for file, part in zip(files, parts) for name in part},
        }
        (path / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, part in zip(files, parts):
        save_file(part, file, metadata={"format": "pt"})
    return files


def param_slice(params: dict[str, torch.Tensor], weight: Weight) -> torch.Tensor:
    """The view of our parameter that holds a published tensor, up to dimensions of size 1."""
    try:
        out = params[weight.param]
    except KeyError:
        raise WeightError(
            f"{weight.name} belongs in parameter {weight.param}, which the model lacks: "
            "the model was built from another config"
        ) from None
    if weight.expert is not None:
        out = out[weight.expert]
    if weight.rows is not None:
        out = out[weight.rows[0] : weight.rows[1]]
    return out


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise WeightError(f"no such folder: {folder}; give a folder with {SINGLE_NAME} or {INDEX_NAME}")
    if (folder / INDEX_NAME).is_file():
        try:
            names = sorted(
                set(json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise WeightError(f"{folder / INDEX_NAME} is not an index ({e!r}): restore it") from e
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise WeightError(f"{INDEX_NAME} names {name!r}: only plain *.safetensors names are read")
            if not (folder / name).is_file():
                raise WeightError(f"{folder} lacks {name}, which {INDEX_NAME} names: download it again")
        return [folder / name for name in names]
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    hint = f" ({pickles[0]} is a pickle, which is not read: convert it)" if pickles else ""
    raise WeightError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as e:
        raise WeightError(f"{file} is damaged ({e}): download it again") from e


def _check_header(weight: Weight, header: object, file: Path) -> None:
    shape, dtype = tuple(header.get_shape()), header.get_dtype()  # type: ignore[attr-defined]
    same = shape == weight.shape
    if weight.name.endswith((".A_log", "_conv1d.weight")):
        # Stored with and without the dimensions of size 1, depending on who wrote the file.
        same = [n for n in shape if n != 1] == [n for n in weight.shape if n != 1]
    if not same:
        raise WeightError(
            f"{weight.name} has shape {list(shape)} in {file.name}, the config asks for "
            f"{list(weight.shape)}: the weights belong to another config"
        )
    if dtype not in _FLOATS:
        raise WeightError(
            f"{weight.name} has dtype {dtype} in {file.name}, want one of {', '.join(_FLOATS)}: "
            "quantised weights are not read here"
        )


def _check_names(found: object, table: dict[str, Weight], folder: Path) -> None:
    have = set(found)  # type: ignore[call-overload]
    missing = [n for n in table if n not in have]
    extra = sorted(have - table.keys())
    if missing or extra:
        said = []
        if missing:
            said.append(f"lack {len(missing)} tensors the config asks for ({_some(missing)})")
        if extra:
            said.append(f"have {len(extra)} tensors the config has no place for ({_some(extra)})")
        raise WeightError(f"the weights in {folder} {' and '.join(said)}: use the config.json they came with")


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def _check_finite(name: str, tensor: torch.Tensor, file: Path) -> None:
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise WeightError(f"{name} has {bad} NaN or infinite values ({file}): the checkpoint is damaged")
