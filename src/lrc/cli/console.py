"""Where the commands print."""

from rich.console import Console

console = Console()


def quiet_libraries() -> None:
    """Keep the libraries' own bars and notices out of ours."""
    import logging

    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
