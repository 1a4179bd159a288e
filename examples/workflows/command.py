"""Command-line options, loading of the data set and printing of tables for all workflows."""

from __future__ import annotations

import argparse

import pandas

from examples.workflows import data


def parser(description: str | None, epochs: int | None = None) -> argparse.ArgumentParser:
    """A parser with `--data` and `--small`, and with `--epochs` if a default for it is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FOLDER", help="a data set to use instead of scikit-learn's digits")
    parser.add_argument("--small", action="store_true", help="narrow networks and few images: a minute or two")
    if epochs is not None:
        parser.add_argument("--epochs", type=int, default=epochs, help=f"of training (default {epochs})")
    return parser


def dataset(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> data.Dataset:
    """The data set that the arguments name. If it cannot be loaded, prints the reason and exits with status 2."""
    try:
        found = data.load(arguments.data)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    found = found.first(1000, 500) if arguments.small else found
    print(f"{found.name}: {len(found.train)} training and {len(found.test)} test images, {found.classes} classes")
    return found


def show(table: pandas.DataFrame, title: str) -> None:
    """Prints a table with three decimals per number."""
    print(
        f"\n{title}\n{table.to_string(index=False, float_format=lambda value: f'{value:.3f}', na_rep='')}", flush=True
    )
