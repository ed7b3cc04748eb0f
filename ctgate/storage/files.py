"""Solutions in netCDF and Zarr files, whole or not at all."""

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from ctgate.solution import Solution
from ctgate.storage.dataset import FORMAT, from_dataset, to_dataset
from ctgate.storage.dense import dense_tree, stored_dense

_KINDS = {".nc": "a .nc is a netCDF file", ".zarr": "a .zarr is a directory, the Zarr store"}
_NO_DENSE = "the file holds no dense output; save a solution that was solved with dense=True"


@torch.no_grad()
def save(sol: Solution, path: str | Path) -> None:
    """Write a solution with its dense output to ``.nc`` (h5netcdf) or ``.zarr``.

    The file appears whole or not at all, and replaces one of the same name. A Zarr store is a directory,
    which no rename replaces: the old one is named ``<stem>.replaced-<token>.zarr`` until the new one has its
    place, and is there to be loaded if the process dies in between.

    Raises: ValueError for another suffix, a path with ``::``, a ``.nc`` that is a directory or a ``.zarr``
    that is a file; OSError when writing fails.
    """
    target = _checked_path(path)
    if target.exists() and target.is_dir() != (target.suffix == ".zarr"):
        raise ValueError(
            f"path is {str(target)!r}; it must not be {_kind(target)}, for {_KINDS[target.suffix]}"
        )
    dense = {} if isinstance(sol.dense, str) else {"dense": dense_tree(sol.dense, sol.alg)}
    tree = xr.DataTree(to_dataset(sol), children=dense)
    partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    try:
        if target.suffix == ".nc":
            tree.to_netcdf(partial, engine="h5netcdf")
        else:
            tree.to_zarr(partial, mode="w", consolidated=False)
        _rename(partial, target)
    finally:
        _remove(partial)


def load(path: str | Path) -> Solution:
    """Read a solution that :meth:`ctgate.Solution.save` wrote.

    Its ``prob`` is None; ``sol(t)``, gates and labels work.

    Raises: FileNotFoundError; ValueError for a suffix, a path with ``::`` or a file that is not a ctgate
    solution.
    """
    source = _checked_path(path)
    if not source.exists():
        raise FileNotFoundError(f"there is no file {str(source)!r}")
    with _opened(source) as tree:
        root = tree.to_dataset().load()
        nodes = tree["dense"].to_dataset().load() if "dense" in tree.children else None
    if root.attrs.get("format") != FORMAT:
        raise ValueError(
            f"{str(source)!r} is not a ctgate solution: its format is {root.attrs.get('format')!r}"
        )
    return from_dataset(root, _NO_DENSE if nodes is None else stored_dense(nodes))


def _checked_path(path: str | Path) -> Path:
    full = Path(path).absolute()
    if full.suffix not in _KINDS:
        raise ValueError(f"path is {str(path)!r}; its suffix must be .nc (netCDF) or .zarr (Zarr)")
    if "::" in str(full):
        raise ValueError(
            f"path is {str(full)!r}; it must not contain '::', which the libraries that write the file take "
            "for a chain of file systems"
        )
    return full


def _kind(path: Path) -> str:
    return "a directory" if path.is_dir() else "a file"


def _rename(partial: Path, target: Path) -> None:
    """Give a finished file its name; at every moment the old or the new one is whole on the disk."""
    if target.suffix == ".nc" or not os.path.lexists(target):
        os.replace(partial, target)
        return
    old = target.with_name(f"{target.stem}.replaced-{secrets.token_hex(4)}{target.suffix}")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(old, target)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _opened(source: Path) -> xr.DataTree:
    options: dict[str, Any] = (
        {"engine": "h5netcdf"} if source.suffix == ".nc" else {"engine": "zarr", "consolidated": False}
    )
    try:
        return xr.open_datatree(source, **options)
    except (OSError, ValueError) as error:
        # With an errno the system refused (permissions, a lock); without one the contents made no sense.
        refused = isinstance(error, OSError) and error.errno is not None
        if refused and source.is_dir() == (source.suffix == ".zarr"):
            raise
        raise ValueError(
            f"{str(source)!r} is not a ctgate solution: as {_kind(source)} it cannot be opened, "
            f"where {_KINDS[source.suffix]}"
        ) from error
