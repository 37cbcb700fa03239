"""Products with float32 results, and selections of the largest logits, against float64 and plain torch."""

import pytest
import torch

from dft.loss import products, rows

SETTING = torch.backends.mkldnn.matmul


@pytest.mark.parametrize(("dtype", "setting"), [(torch.bfloat16, "bf16"), (torch.float16, "none")])
def test_logits_of_half_precision_factors_are_exact_to_float32(monkeypatch, dtype, setting):
    """Only factors that are bfloat16 values may be rounded to bfloat16."""
    monkeypatch.setattr(products, "BLOCK_BYTES", 4 * 96 * 100)  # three blocks, the last one partial
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 96, generator=generator).to(dtype)
    weight = torch.randn(250, 96, generator=generator).to(dtype)
    settings, product = [], torch.mm

    def recorded(*factors, **out):
        settings.append(SETTING.fp32_precision)
        return product(*factors, **out)

    monkeypatch.setattr(torch, "mm", recorded)
    logits = products.wide_product(hidden, weight, torch.empty(80, 250))
    assert settings == [setting] * 3 and SETTING.fp32_precision == "none"
    assert logits.shape == (70, 250) and logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), hidden.double() @ weight.double().t(), rtol=0, atol=2e-5)


def test_the_setting_of_onednn_is_restored_after_an_error():
    before = SETTING.fp32_precision
    with pytest.raises(ValueError), products.bfloat16_factors(True):
        assert SETTING.fp32_precision == "bf16"
        raise ValueError
    assert SETTING.fp32_precision == before


@pytest.mark.parametrize("vocab", [1, 19, 33, 1000, 1281, 5000])
def test_the_largest_logits_are_those_of_topk(vocab):
    generator = torch.Generator().manual_seed(vocab)
    tile = torch.randn(9, vocab + 3, generator=generator)[:, :vocab]  # not contiguous
    tile[3] = tile[3].sort().values
    tile[4] = tile[4].round()  # equal logits
    tile[5, 1:] = -torch.inf
    expected = tile.topk(min(20, vocab)).values
    assert torch.equal(rows.largest_values(tile, 20), expected)


def test_a_target_is_correct_if_it_is_the_first_of_equal_logits():
    tile = torch.tensor([[1.0, 3, 3], [1, 3, 3], [3, 1, 2], [2, 3, 1], [3, 3, 3]])
    targets = torch.tensor([1, 2, 0, 2, 0])
    stats, _ = rows.score_rows_torch(tile.clone(), targets, None, rows.RowOptions())
    assert stats.correct.tolist() == [True, False, True, False, True]
    assert torch.equal(stats.correct, tile.argmax(1) == targets)
