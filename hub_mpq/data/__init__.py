"""Data loaders: batches of images, preprocessed as the model expects, and batches of token ids."""

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
