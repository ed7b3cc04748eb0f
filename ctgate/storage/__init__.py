"""Solutions with labels: as an xarray Dataset, and in netCDF and Zarr files."""

from ctgate.storage.dataset import to_dataset as to_dataset
from ctgate.storage.files import load as load
from ctgate.storage.files import save as save
