"""Curate image data sets in WebDataset shards, on Dask.

tar shards -> index frame -> image batches -> embeddings -> scores -> masks -> clusters ->
duplicates -> tar shards

Two faces over one implementation: stages (:class:`Pipeline`) for runs that are recorded and can be
resumed, and functions on Dask frames (:func:`read_webdataset`, :func:`embed` ...) for people who
think in frames.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imgcurate.batches import ImageBatch, PixelView
    from imgcurate.cluster import open_client
    from imgcurate.errors import ImgcurateError
    from imgcurate.exchange_files import export_run
    from imgcurate.frame import read_webdataset
    from imgcurate.pipeline import Pipeline, Result
    from imgcurate.refiltering import refilter
    from imgcurate.report.page import make_report
    from imgcurate.searching import search
    from imgcurate.stages import (
        ColumnFilterStage,
        DatasetStage,
        ExactDedupStage,
        FilePartitioningStage,
        ImageAestheticFilterStage,
        ImageCaptionFilterStage,
        ImageEmbeddingStage,
        ImageNSFWFilterStage,
        ImageQualityFilterStage,
        ImageReaderStage,
        ImageWriterStage,
        ImageZeroShotFilterStage,
        PerceptualDedupStage,
        ProcessingStage,
        Rule,
        SemanticDedupStage,
        ValueRule,
        Worker,
        embed,
        exact_dedup,
        perceptual_dedup,
        score_aesthetic,
        score_captions,
        score_nsfw,
        score_quality,
        score_zero_shot,
        semantic_dedup,
        write_webdataset,
    )
    from imgcurate.standalone import DedupedEmbeddings, dedup_embeddings
    from imgcurate.verification import Verification, verify_run

__version__ = "0.1.0"

# Resolved on first use, so that the command line answers --help without loading torch.
_HOMES = {
    "ImageBatch": "batches",
    "PixelView": "batches",
    "open_client": "cluster",
    "ImgcurateError": "errors",
    "read_webdataset": "frame",
    "Pipeline": "pipeline",
    "Result": "pipeline",
    "refilter": "refiltering",
    "make_report": "report",
    "search": "searching",
    "export_run": "exchange_files",
    "DedupedEmbeddings": "standalone",
    "dedup_embeddings": "standalone",
    "Verification": "verification",
    "verify_run": "verification",
    "ColumnFilterStage": "stages",
    "DatasetStage": "stages",
    "ExactDedupStage": "stages",
    "FilePartitioningStage": "stages",
    "ImageAestheticFilterStage": "stages",
    "ImageCaptionFilterStage": "stages",
    "ImageEmbeddingStage": "stages",
    "ImageNSFWFilterStage": "stages",
    "ImageQualityFilterStage": "stages",
    "ImageReaderStage": "stages",
    "ImageWriterStage": "stages",
    "ImageZeroShotFilterStage": "stages",
    "PerceptualDedupStage": "stages",
    "ProcessingStage": "stages",
    "Rule": "stages",
    "SemanticDedupStage": "stages",
    "ValueRule": "stages",
    "Worker": "stages",
    "embed": "stages",
    "exact_dedup": "stages",
    "perceptual_dedup": "stages",
    "score_aesthetic": "stages",
    "score_captions": "stages",
    "score_nsfw": "stages",
    "score_quality": "stages",
    "score_zero_shot": "stages",
    "semantic_dedup": "stages",
    "write_webdataset": "stages",
}

__all__ = [
    "ColumnFilterStage",
    "DatasetStage",
    "DedupedEmbeddings",
    "ExactDedupStage",
    "FilePartitioningStage",
    "ImageAestheticFilterStage",
    "ImageBatch",
    "ImageCaptionFilterStage",
    "ImageEmbeddingStage",
    "ImageNSFWFilterStage",
    "ImageQualityFilterStage",
    "ImageReaderStage",
    "ImageWriterStage",
    "ImageZeroShotFilterStage",
    "ImgcurateError",
    "PerceptualDedupStage",
    "Pipeline",
    "PixelView",
    "ProcessingStage",
    "Result",
    "Rule",
    "SemanticDedupStage",
    "ValueRule",
    "Verification",
    "Worker",
    "dedup_embeddings",
    "embed",
    "exact_dedup",
    "export_run",
    "make_report",
    "open_client",
    "perceptual_dedup",
    "read_webdataset",
    "refilter",
    "score_aesthetic",
    "score_captions",
    "score_nsfw",
    "score_quality",
    "score_zero_shot",
    "search",
    "semantic_dedup",
    "verify_run",
    "write_webdataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'imgcurate' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"imgcurate.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
