"""How far back a gated network learns from N samples: from its envelope and its noise to the window."""

from ctgate.learnability.aggregation import aggregation_index
from ctgate.learnability.bands import banded_product
from ctgate.learnability.detection import detectability, detection_threshold, kappa, sample_size
from ctgate.learnability.effective import correlation_factor, correlation_time
from ctgate.learnability.envelope import kernel_envelope
from ctgate.learnability.figures import plot_required_samples, plot_windows
from ctgate.learnability.matched import matched_statistic
from ctgate.learnability.regimes import fit_law, select_regime
from ctgate.learnability.resampling import resampled_samples
from ctgate.learnability.scaling import (
    Exponential,
    Floor,
    Logarithmic,
    Polynomial,
    Stretched,
    closed_form_window,
)
from ctgate.learnability.stable import fit_stable
from ctgate.learnability.stable_fit import StableFit
from ctgate.learnability.stable_streams import StableStream
from ctgate.learnability.window import required_samples, window

__all__ = [
    "Exponential",
    "Floor",
    "Logarithmic",
    "Polynomial",
    "StableFit",
    "StableStream",
    "Stretched",
    "aggregation_index",
    "banded_product",
    "closed_form_window",
    "correlation_factor",
    "correlation_time",
    "detectability",
    "detection_threshold",
    "fit_law",
    "fit_stable",
    "kappa",
    "kernel_envelope",
    "matched_statistic",
    "plot_required_samples",
    "plot_windows",
    "required_samples",
    "resampled_samples",
    "sample_size",
    "select_regime",
    "window",
]
