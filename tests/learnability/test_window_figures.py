"""Figures show what the Datasets hold, and what is censored as censored."""

import matplotlib as mpl
import numpy as np
import pytest

from ctgate.learnability.figures import plot_required_samples, plot_windows
from ctgate.learnability.resampling import resampled_samples
from ctgate.learnability.scaling import Exponential, closed_form_window
from ctgate.learnability.window import required_samples, window


def measured(signal):
    generator = np.random.default_rng(0)
    psi = generator.standard_normal((len(signal), 100_000))
    return resampled_samples(psi, signal, lags=np.arange(1, len(signal) + 1), generator=generator)


def drawn(axes):
    lines = {line.get_label(): line for line in axes.get_lines()}
    lines |= {container.get_label(): container[0] for container in axes.containers}
    return {name: (line.get_xdata(), line.get_ydata()) for name, line in lines.items()}


def test_samples_against_signal():
    data = measured([1.5, 0.9, 0.6, 0.01])
    formula = required_samples([1.5, 0.9, 0.6, 0.0], 2.0, 0.5**0.5, lags=[1, 2, 3, 4])
    before = dict(mpl.rcParams)
    figure = plot_required_samples(data, formula)
    assert dict(mpl.rcParams) == before
    lines = drawn(figure.axes[0])
    np.testing.assert_array_equal(lines["measured by resampling"][0], [1.5, 0.9, 0.6])
    np.testing.assert_array_equal(lines["more than this"][0], [0.01])
    assert sum(name.startswith("slope") for name in lines) == 1
    assert len(lines["from tail index and scale"][0]) == 3


def test_windows_against_samples():
    lags = np.arange(1, 60)
    numbers = np.geomspace(10.0, 1e7, 8)
    law = Exponential(0.5, 9.0)
    windows = {
        "measured": window(law(lags), lags, numbers, 1.6),
        "closed form": closed_form_window(law, numbers, 1.6),
    }
    figure = plot_windows(windows)
    axes = figure.axes[0]
    lines = drawn(axes)
    shown = ~windows["measured"]["empty"].to_numpy()
    np.testing.assert_array_equal(lines["measured"][0], numbers[shown])
    assert "steps" in axes.get_ylabel()
    figure.canvas.draw()


def test_refuses():
    data = measured([1.5, 0.9])
    with pytest.raises(ValueError, match="lags differ"):
        plot_required_samples(data, required_samples([1.0, 0.5], 2.0, lags=[2, 3]))
    with pytest.raises(ValueError, match="no lag"):
        plot_required_samples(measured([0.001, 0.002]))
    with pytest.raises(ValueError, match="windows is empty"):
        plot_windows({})
