"""Tests; the type checker stands here because the import hook looks it up as an attribute."""

from tests import typechecker as typechecker
