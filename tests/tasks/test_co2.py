"""The CO2 record, its thinned histories, and that nothing in them comes from the future."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from ctgate.tasks import co2

NAN = float("nan")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(count: int = 60, seed: int = 1) -> Tensor:
    """A record with a trend, noise and a gap."""
    record = 300.0 + 0.1 * torch.arange(count, dtype=torch.float64)
    record += torch.randn(count, generator=rng(seed), dtype=torch.float64)
    record[17:20] = NAN
    return record


def same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(left.nan_to_num(), right.nan_to_num())


def test_the_record_is_the_published_one() -> None:
    record = co2.load()
    assert record.sizes == {"time": 2284}
    assert int(record["co2"].isnull().sum()) == 59
    assert record["co2"].values[:3].tolist() == [316.1, 317.3, 317.6]
    assert (float(record["co2"].min()), float(record["co2"].max())) == (313.0, 373.9)
    assert record["date"].values[[0, -1]].astype("datetime64[D]").astype(str).tolist() == [
        "1958-03-29",
        "2001-12-29",
    ]
    assert np.array_equal(record["time"].values, np.arange(2284.0))
    assert (record["co2"].units, record["time"].units) == ("ppm", "weeks")
    assert record.licence == "public domain"
    assert "Keeling" in record.source


def test_without_statsmodels_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("statsmodels.datasets.co2", "statsmodels.datasets", "statsmodels"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ctgate\[report\]'"):
        co2.load()


def test_thinning_keeps_a_share_of_the_values_and_the_first() -> None:
    record = values(2000)
    thinned = co2.thin(record, 0.3, 4, rng())
    kept = ~thinned.isnan()
    assert kept[0].all()
    assert torch.equal(thinned[kept], record[:, None].expand(-1, 4)[kept])
    share = kept.double().mean(0) / (~record.isnan()).double().mean()
    assert ((share - 0.3).abs() < 4 * math.sqrt(0.3 * 0.7 / 2000)).all()
    assert len({tuple(column.tolist()) for column in kept.T}) == 4
    assert same(thinned, co2.thin(record, 0.3, 4, rng()))
    assert same(co2.thin(record, 1.0, 1, rng())[:, 0], record)


def test_holding_and_anomaly_against_loops() -> None:
    observed = co2.thin(values(), 0.4, 3, rng())
    held, age = co2.hold(observed)
    deviation = co2.anomaly(observed, 10)
    for j in range(3):
        last = 0
        for k in range(len(observed)):
            if not math.isnan(observed[k, j]):
                last = k
                window = [float(v) for v in observed[max(k - 9, 0) : k + 1, j] if not math.isnan(v)]
                mean = sum(window) / len(window)
                assert float(deviation[k, j]) == pytest.approx(float(observed[k, j]) - mean, abs=1e-10)
            else:
                assert math.isnan(deviation[k, j])
            assert (float(held[k, j]), float(age[k, j])) == (float(observed[last, j]), k - last)


def test_the_value_ahead() -> None:
    record = torch.arange(5.0)
    assert same(co2.ahead(record, 2), torch.tensor([2.0, 3.0, 4.0, NAN, NAN]))
    assert co2.ahead(record, 9).isnan().all()


def forecasting(record: Tensor) -> co2.Forecasting:
    return co2.Forecasting(record, horizon=3, split=40, keep=0.5)


def test_inputs_know_nothing_of_the_future() -> None:
    """With another record from week 30 on, the inputs before are the same bits, the later ones are not."""
    record = values()
    other = record.clone()
    other[30:] += 7.0
    scales = co2.Scales(anomaly=2.0, change=3.0, age=2.0)
    first, second = (
        forecasting(series).histories(forecasting(series).thinnings(5, rng()), scales)
        for series in (record, other)
    )
    for name in ("inputs", "first", "held"):
        one, two = getattr(first, name), getattr(second, name)
        assert same(one[:30], two[:30])
        assert not same(one[30:], two[30:])


def test_scales_are_those_of_the_training_years() -> None:
    record = values()
    other = record.clone()
    other[40:] *= 3.0
    task, changed = forecasting(record), forecasting(other)
    scales = task.scales(task.thinnings(5, rng()))
    assert scales == changed.scales(changed.thinnings(5, rng()))
    assert scales.age == 2.0
    observed = task.thinnings(5, rng())
    held, _ = co2.hold(observed)
    errors = [
        float(record[k + 3] - held[k, j])
        for k in range(37)
        for j in range(5)
        if not math.isnan(record[k + 3])
    ]
    assert scales.change == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(errors)), rel=1e-12)


def test_histories_are_in_their_scales() -> None:
    record = values()
    task = forecasting(record)
    observed = task.thinnings(2, rng())
    histories = task.histories(observed, co2.Scales(anomaly=2.0, change=4.0, age=5.0))
    held, age = co2.hold(observed)
    assert torch.allclose(histories.inputs[..., 1], age / 5.0, rtol=1e-15)
    assert same(histories.inputs[..., 0], co2.anomaly(observed, 52) / 2.0)
    assert torch.allclose(
        (4.0 * histories.change + held)[:57], record[3:, None].expand(-1, 2), rtol=1e-14, equal_nan=True
    )


def test_a_window_begins_with_a_value_to_hold() -> None:
    task = forecasting(values())
    histories = task.histories(task.thinnings(4, rng()), co2.Scales(1.0, 1.0, 1.0))
    starts, thinnings = torch.tensor([0, 7, 18]), torch.tensor([3, 0, 1])
    inputs, change = histories.window(starts, thinnings, 12)
    for column, (start, thinning) in enumerate(zip(starts.tolist(), thinnings.tolist(), strict=True)):
        assert same(inputs[1:, column], histories.inputs[start + 1 : start + 12, thinning])
        assert same(change[:, column], histories.change[start : start + 12, thinning])
    assert not inputs[0].isnan().any()
    held_anomaly, _ = co2.hold(histories.inputs[..., 0])
    assert inputs[0, :, 0].tolist() == held_anomaly[starts, thinnings].tolist()


def test_origins_have_their_target_on_their_side_of_the_split() -> None:
    task = forecasting(values())
    training, test = task.origins(5, 40), task.origins(40, 60)
    assert training.nonzero()[:, 0].tolist() == [k for k in range(5, 37) if k + 3 not in (17, 18, 19)]
    assert test.nonzero()[:, 0].tolist() == list(range(40, 57))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: co2.thin(values(), 0.0, 1, rng()), r"keep is 0.0; it must be a probability"),
        (lambda: co2.thin(values(), 1.5, 1, rng()), r"keep is 1.5"),
        (lambda: co2.thin(values(), 0.5, 0, rng()), r"count is 0; it must be at least 1"),
        (lambda: co2.thin(values()[18:], 0.5, 1, rng()), r"values\[0\] is nan"),
        (lambda: co2.hold(values()[18:, None]), r"observed has a nan in its first row"),
        (lambda: co2.Forecasting(values(), 0, 40, 0.5), r"horizon is 0; it must be at least 1 week"),
        (
            lambda: co2.Forecasting(values(), 13, 10, 0.5),
            r"split is 10; it must leave more than horizon = 13",
        ),
        (lambda: co2.Forecasting(values(), 13, 50, 0.5), r"split is 50; .* of the 60 weeks"),
    ],
)
def test_bad_arguments_are_named(make, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
