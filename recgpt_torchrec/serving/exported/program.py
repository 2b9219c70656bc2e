"""Makes programs of an encoder: `torch.export` (.pt2), which runs with torch alone, and ONNX."""

import importlib.util
import logging
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.serving.exported.encoder import FullEncoder, StepEncoder, names_of_columns, names_of_request

OPSET = 18
"""Of ONNX."""
ONNX_PACKAGES = ("onnx", "onnxscript")


def check_onnx() -> None:
    """Raise an `InputError` if the packages that write ONNX are not installed."""
    if missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"--encoder.onnx needs {' and '.join(missing)}, which cannot be imported; install the extra onnx: "
            "pip install 'recgpt-torchrec[onnx]'"
        )


def describe_inputs(encoder: FullEncoder | StepEncoder) -> dict[str, tuple[torch.dtype, list[str | int]]]:
    """The arguments of an encoder: dtype and shape by name; a word is a size that may differ from call to call."""
    tower, dim = encoder.tower, encoder.tower.dim
    ids, flags, vectors = (torch.int64, ["batch"]), (torch.int64, ["batch", "length"]), (torch.float32, ["batch", dim])
    found: dict[str, Any] = {}
    if isinstance(encoder, FullEncoder):
        found = {"items": flags, "lengths": ids}
        found |= {"user_vectors": vectors} if encoder.users is None else {"users": ids}
    else:
        found = {"item_vectors": (torch.float32, ["batch", "length", dim]), "lengths": ids, "user_vectors": vectors}
    found |= dict.fromkeys(names_of_columns(tower.inputs, tower.prompts), flags)
    return found | dict.fromkeys(names_of_request(tower.inputs), ids)


def export_program(encoder: FullEncoder | StepEncoder) -> ExportedProgram:
    """Trace an encoder, in float32 on the CPU, for any number of histories of any length."""
    dynamic = {"batch": Dim("batch", min=1), "length": Dim("length", min=1)}
    arguments, shapes = _example(encoder), {}
    for name, (_, shape) in describe_inputs(encoder).items():
        shapes[name] = {place: dynamic[size] for place, size in enumerate(shape) if isinstance(size, str)}
    with torch.no_grad(), _quiet():
        return torch.export.export(encoder.eval(), (), kwargs=arguments, dynamic_shapes=shapes)


def write_onnx(program: ExportedProgram, inputs: Mapping[str, Any], path: str) -> None:
    """Write a program as one ONNX file, if it is below the 2 GB that such a file holds.

    Args:
        program: to write.
        inputs: of the encoder, see `describe_inputs`.
        path: of the file.

    Raises:
        InputError: a package is missing, or the program cannot be expressed.
    """
    check_onnx()
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=["interests"],
                verbose=False,
            )
            assert made is not None
            made.save(path, include_initializers=True, external_data=False)
    except Exception as error:
        raise InputError(
            f"--encoder.onnx: the encoder cannot be written as ONNX ({' '.join(str(error).split())[:300]}); leave the "
            "option out, and serve the program for torch"
        ) from error


def _example(encoder: FullEncoder | StepEncoder) -> dict[str, Tensor]:
    """Arguments to trace with: three histories of two or more entries."""
    sizes = {"batch": 3, "length": 4}
    arguments = {}
    for name, (dtype, shape) in describe_inputs(encoder).items():
        arguments[name] = torch.zeros([sizes[size] if isinstance(size, str) else size for size in shape], dtype=dtype)
    arguments["lengths"] = torch.tensor([2, 4, 3])
    return arguments


@contextmanager
def _quiet() -> Any:
    """Without the remarks of torch's exporters on standard error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
