"""The weights of a run in one safetensors file, whatever number of ranks has written its checkpoint."""

from pathlib import Path

import torch
from safetensors.torch import save

from morex.files import write_whole
from morex.loading import ConfigError
from morex.train.checkpoint import load
from morex.train.tensors import model_tensors

NUMBER_FORMATS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_weights(path: Path, out: Path, number_format: str | None = None) -> int:
    """Writes weights and router buffers, by name, with the model's config as JSON in the file's metadata, `config`.

    Args:
        path: a run folder (its newest checkpoint) or a checkpoint folder.
        out: the file; it must not be there yet.
        number_format: a key of NUMBER_FORMATS; default: that of the checkpoint.

    Returns:
        Bytes of the file.

    Raises:
        ConfigError: there is no such run or format, or the file is there already.
        OSError: the disk is full or not writable; then there is no file.
    """
    if number_format is not None and number_format not in NUMBER_FORMATS:
        raise ConfigError(f"number format '{number_format}' is unknown; use {', '.join(NUMBER_FORMATS)}")
    if out.exists():
        raise ConfigError(f"'{out}' is there already; name another file")
    model, _ = load(path)
    tensors = {name: tensor.detach() for name, tensor in model_tensors(model).items()}
    if number_format is not None:
        wanted = NUMBER_FORMATS[number_format]
        tensors = {
            name: tensor.to(wanted) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
        }
    metadata = {"format": "pt", "config": model.config.model_dump_json()}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, content)
    return len(content)
