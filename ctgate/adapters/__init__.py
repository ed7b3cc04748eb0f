"""Sequences, pandas and xarray into controls, and solutions back."""

from ctgate.adapters.arrays import from_xarray as from_xarray
from ctgate.adapters.arrays import to_xarray as to_xarray
from ctgate.adapters.frames import from_pandas as from_pandas
from ctgate.adapters.frames import to_pandas as to_pandas
from ctgate.adapters.labels import Labels as Labels
from ctgate.adapters.labels import TimeAxis as TimeAxis
from ctgate.adapters.sequences import from_sequences as from_sequences
from ctgate.adapters.sequences import to_sequences as to_sequences
