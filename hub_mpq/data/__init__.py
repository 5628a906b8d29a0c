"""Images as batches, in the shape and colours a model wants, and text as token ids."""

from .config import data_config
from .folders import list_images, read_class_map
from .images import Images
from .loaders import image_loader
from .order import Shuffled, ShuffledEpochs
from .text import text_loader, text_tokens

__all__ = [
    "Images",
    "Shuffled",
    "ShuffledEpochs",
    "data_config",
    "image_loader",
    "list_images",
    "read_class_map",
    "text_loader",
    "text_tokens",
]
