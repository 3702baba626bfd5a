"""Progress bars, as everything that takes long shows them."""

import os
from typing import Any

from accelerate.utils import tqdm as on_main_process
from tqdm import tqdm as Bar

__all__ = ["tqdm"]


def tqdm(*args: Any, **options: Any) -> Bar:
    """accelerate's, of the main process alone; none where TQDM_DISABLE is set, which accelerate's would override."""
    return on_main_process(*args, disable=bool(os.environ.get("TQDM_DISABLE")), **options)
