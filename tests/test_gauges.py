import math

import pytest
import torch

from vicreg_mm.gauges import modality_gap, per_dimension_std, rankme


def test_rankme_of_r_equal_singular_values_is_r():
    q, _ = torch.linalg.qr(torch.randn(64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    for rank in (1, 3, 16):
        features = q[:, :rank] @ torch.eye(16, dtype=torch.float64)[:rank]
        assert rankme(features, eps=0.0 if rank == 16 else 1e-12).item() == pytest.approx(rank, rel=1e-6)


def test_rankme_equals_the_equation_written_out():
    features = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # singular values 3 and 1
    p = [3 / 4 + 1e-7, 1 / 4 + 1e-7]
    assert rankme(features).item() == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-6)


def test_rankme_is_not_centred_and_ignores_scale_and_rotation():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, 8, dtype=torch.float64, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=generator))
    assert rankme(7 * features @ rotation).item() == pytest.approx(rankme(features).item(), rel=1e-9)
    assert rankme(features + 100).item() < 0.5 * rankme(features).item()


def test_rankme_of_collapsed_features_is_one():
    assert rankme(torch.ones(20, 5)).item() == pytest.approx(1, abs=1e-4)
    assert rankme(torch.zeros(20, 5)).item() == 1


def test_per_dimension_std_is_unbiased_and_float32_for_half_precision():
    features = torch.tensor([[0.0, 1.0], [2.0, 1.0]], dtype=torch.bfloat16)
    assert per_dimension_std(features).tolist() == pytest.approx([math.sqrt(2), 0.0])
    assert per_dimension_std(features).dtype == torch.float32
    assert rankme(features.double()).dtype == torch.float64


@pytest.mark.parametrize("gauge", [rankme, per_dimension_std])
def test_what_cannot_be_gauged_is_named(gauge):
    with pytest.raises(ValueError, match=r"shape \[4\]"):
        gauge(torch.ones(4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        gauge(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))


def test_one_row_has_no_std():
    with pytest.raises(ValueError, match="N >= 2"):
        per_dimension_std(torch.ones(1, 4))


def test_the_modality_gap_equals_the_equation_written_out():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(30, 5, dtype=torch.float64, generator=generator), torch.rand(7, 5, dtype=torch.float64, generator=generator)
    centre_a = sum(row / row.square().sum().sqrt() for row in a) / 30
    centre_b = sum(row / row.square().sum().sqrt() for row in b) / 7
    assert modality_gap(a, b).item() == pytest.approx((centre_a - centre_b).square().sum().sqrt().item(), rel=1e-12)


def test_the_modality_gap_goes_from_nothing_to_opposite_points_whatever_the_lengths():
    a = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    assert modality_gap(a, 7 * a.flip(0)).item() == pytest.approx(0, abs=1e-6)
    assert modality_gap(a, -2 * a).item() == pytest.approx(2)
    assert modality_gap(torch.eye(2), -torch.eye(2)).item() == pytest.approx(2 * math.sqrt(0.5))
    assert modality_gap(a.bfloat16(), torch.zeros(3, 2)).dtype == torch.float32


def test_a_gap_needs_two_modalities_of_one_width():
    with pytest.raises(ValueError, match=r"shapes \[2, 3\] and \[4, 5\]; one width"):
        modality_gap(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"shape \[0, 3\]; \[N, F\] with N >= 1"):
        modality_gap(torch.ones(2, 3), torch.ones(0, 3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        modality_gap(torch.full((2, 3), float("nan")), torch.ones(2, 3))
