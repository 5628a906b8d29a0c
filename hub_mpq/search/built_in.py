"""The package's own strategies: importing them registers them."""

from . import bsq, dq, ebs, hessian, limpq, posttraining, seam

__all__ = ["bsq", "dq", "ebs", "hessian", "limpq", "posttraining", "seam"]
