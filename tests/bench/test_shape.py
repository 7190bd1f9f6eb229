from pathlib import Path

import pytest
import torch

from llm.loading import load_weights, prepare
from tests.bench.shape import SHAPES, ShapeRefused, build


def test_the_small_shape_can_be_loaded(tmp_path: Path) -> None:
    build(SHAPES["llama3-tiny"], tmp_path)

    model = load_weights(prepare(str(tmp_path)), device="cpu")

    assert model.dtype == torch.bfloat16
    size = sum(tensor.numel() * tensor.itemsize for tensor in model.parameters() if tensor.ndim == 2)
    assert size == SHAPES["llama3-tiny"].bytes


def test_eight_billion_parameters_are_eight_billion() -> None:
    assert SHAPES["llama3-8b"].bytes / 2 == pytest.approx(8.03e9, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_large_shape_is_refused_without_a_gpu_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ShapeRefused, match="GPU"):
        build(SHAPES["llama3-8b"], tmp_path)

    assert not list(tmp_path.iterdir())
