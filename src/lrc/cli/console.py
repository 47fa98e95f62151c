"""Where the commands print."""

from rich.console import Console

console = Console()


def quiet_libraries() -> None:
    """Keep the libraries' own bars and notices out of ours."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
