"""The plane that a figure shows, and figures from Datasets alone."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
import xarray as xr

import ctgate as ct
from ctgate.dynamics import fixed_points, jacobian_spectrum, principal_plane
from ctgate.dynamics.figures import plot_fixed_points, plot_spectrum

OWN = {"dtype": torch.float64}


def tilted() -> tuple[ct.VectorField, torch.Tensor]:
    """Two wells along one of three orthogonal directions, relaxation along the others; the directions."""
    rng = np.random.default_rng(0)
    axes = torch.tensor(np.linalg.qr(rng.normal(size=(3, 3)))[0].T)

    def slope(t, h, u):
        x, y, z = (h @ axes.T).unbind(-1)
        return torch.stack([x - x**3, -2.0 * y, -3.0 * z], -1) @ axes

    return ct.Field(slope, state_size=3), axes


def cloud(axes: torch.Tensor) -> torch.Tensor:
    """States (time, batch, state) that vary most along the first axis, then along the second."""
    noise = torch.tensor(np.random.default_rng(1).normal(size=(50, 4, 3)))
    return (noise * torch.tensor([2.0, 0.5, 0.01], **OWN)) @ axes


def test_the_flow_in_the_plane_of_the_states() -> None:
    field, axes = tilted()
    points = fixed_points(field, starts=torch.randn(30, 3, generator=torch.Generator().manual_seed(0), **OWN))
    states = cloud(axes)
    plane = principal_plane(field, points, states, size=7)
    flat = states.reshape(-1, 3).numpy()
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    for k in range(2):
        assert abs(plane["axis"][k].to_numpy() @ vectors[:, 2 - k]) == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(plane["variance_share"], values[:0:-1] / values.sum(), rtol=1e-12)
    frame, origin = plane["axis"].to_numpy(), plane["origin"].to_numpy()
    np.testing.assert_allclose(origin, flat.mean(0))
    np.testing.assert_allclose(plane["trajectory"], (states.numpy() - origin) @ frame.T, atol=1e-14)
    for row, column in ((0, 0), (2, 5)):
        h = origin + float(plane["x"][column]) * frame[0] + float(plane["y"][row]) * frame[1]
        slope = field(0.0, torch.tensor(h)).numpy()
        np.testing.assert_allclose(plane["velocity"][row, column], frame @ slope, atol=1e-13)
        assert float(plane["speed"][row, column]) == pytest.approx(np.linalg.norm(slope))
    lifted = origin + plane["position"].to_numpy() @ frame
    np.testing.assert_allclose(
        np.linalg.norm(points["state"] - lifted, axis=1), plane["distance"], atol=1e-14
    )
    assert plane["kind"].values.tolist() == ["stable", "stable", "saddle"]


def test_points_and_input_of_one_number() -> None:
    field = ct.Leaky(2, 2, alpha=1.0, **OWN)
    with torch.no_grad():
        field.weight_hh.copy_(2.0 * torch.eye(2))
        field.weight_ih.copy_(torch.eye(2))
        field.bias.zero_()
    us = torch.tensor([[2.0, 2.0], [0.0, 0.1]], **OWN)
    points = fixed_points(field, us, starts=80, slow=0.0)
    plane = principal_plane(field, points, input_number=1)
    assert plane.sizes["point"] == 9
    middle = torch.tensor(
        plane["origin"].values + np.array([plane["x"][10], plane["y"][10]]) @ plane["axis"].values
    )
    slope = field(0.0, middle, us[1]).detach().numpy()
    np.testing.assert_allclose(plane["velocity"][10, 10], plane["axis"].values @ slope, atol=1e-13)
    with pytest.raises(ValueError, match="it is 2 and the Dataset has 2 inputs"):
        principal_plane(field, points, input_number=2)
    with pytest.raises(ValueError, match="do not span a plane"):
        principal_plane(field, points, input_number=0)


def test_a_figure_of_points_reads_a_dataset_alone(tmp_path: Path) -> None:
    field, axes = tilted()
    points = fixed_points(field, starts=cloud(axes)[:5])
    plane = principal_plane(field, points, cloud(axes))
    before = dict(mpl.rcParams)
    plane.to_netcdf(tmp_path / "plane.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "plane.nc", engine="h5netcdf") as read:
        figure = plot_fixed_points(read)
    figure.savefig(tmp_path / "points.png")
    assert dict(mpl.rcParams) == before
    shown = figure.axes[0]
    labels = [text.get_text() for text in shown.get_legend().get_texts()]
    assert labels == ["stable (2)", "saddle (1)"]
    stable = next(line for line in shown.lines if line.get_label() == "stable (2)")
    np.testing.assert_array_equal(stable.get_xydata(), plane["position"][plane["kind"] == "stable"])
    assert "[1/time]" in figure.axes[1].get_ylabel()


@pytest.mark.parametrize("alg", [None, ct.Euler(0.5)], ids=["flow", "map"])
def test_a_figure_of_a_spectrum(alg: ct.Euler | None, tmp_path: Path) -> None:
    field = ct.GRU(0, 12, generator=torch.Generator().manual_seed(0), **OWN)
    spectrum = jacobian_spectrum(field, torch.zeros(2, 12, **OWN), alg=alg)
    curve = 0.1 * np.exp(2j * np.pi * np.linspace(0, 1, 50))
    figure = plot_spectrum(spectrum, curve)
    figure.savefig(tmp_path / "spectrum.png")
    shown = figure.axes[0]
    points = shown.lines[0].get_xydata()
    np.testing.assert_array_equal(points[:, 0], spectrum["eigenvalue_real"].to_numpy().reshape(-1))
    line, boundary = (shown.lines[k].get_xydata() for k in (1, 2))
    if alg is None:
        np.testing.assert_array_equal(line[:, 0], [0.0, 0.0])
    else:
        np.testing.assert_allclose(np.hypot(*line.T), 1.0)
    np.testing.assert_allclose(boundary[:, 0] + 1j * boundary[:, 1], curve)
    unit = "1/time" if alg is None else "dimensionless"
    assert f"[{unit}]" in shown.get_xlabel()
    assert spectrum.attrs["marginal"] in [text.get_text() for text in shown.get_legend().get_texts()]
    assert len(plot_spectrum(spectrum).axes[0].lines) == 2
