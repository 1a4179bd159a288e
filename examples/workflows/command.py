"""What the command lines of the workflows share."""

from __future__ import annotations

import argparse

import pandas

from examples.workflows import data


def parser(description: str | None, epochs: int | None = None) -> argparse.ArgumentParser:
    """A parser with `--data` and `--small`, and `--epochs` for what trains."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FOLDER", help="a data set to use instead of scikit-learn's digits")
    parser.add_argument("--small", action="store_true", help="narrow networks and few images: a minute or two")
    if epochs is not None:
        parser.add_argument("--epochs", type=int, default=epochs, help=f"of training (default {epochs})")
    return parser


def dataset(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> data.Dataset:
    """The data set that was asked for; says what is wrong with the folder and exits with status 2."""
    try:
        found = data.load(arguments.data)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    found = found.first(1000, 500) if arguments.small else found
    print(f"{found.name}: {len(found.train)} training and {len(found.test)} test images, {found.classes} classes")
    return found


def show(table: pandas.DataFrame, title: str) -> None:
    """Prints a table, three decimals a number."""
    print(
        f"\n{title}\n{table.to_string(index=False, float_format=lambda value: f'{value:.3f}', na_rep='')}", flush=True
    )
