"""stub"""

from pathlib import Path
from isic.config import Settings


class CheckSettings(Settings):
    data: Path


def check(settings: CheckSettings) -> int:
    return 0
