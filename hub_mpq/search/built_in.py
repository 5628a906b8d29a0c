"""The built-in strategies; importing this module registers them."""

from . import bsq, dq, ebs, hessian, limpq, posttraining, seam

__all__ = ["bsq", "dq", "ebs", "hessian", "limpq", "posttraining", "seam"]
