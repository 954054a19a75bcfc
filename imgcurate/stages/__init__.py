"""The stages of a pipeline, and the functions on frames that go with them."""

from imgcurate.stages.aesthetic import ImageAestheticFilterStage, score_aesthetic
from imgcurate.stages.base import DatasetStage, ProcessingStage, Stage, Worker
from imgcurate.stages.caption import ImageCaptionFilterStage, score_captions
from imgcurate.stages.columns import ColumnFilterStage
from imgcurate.stages.deduplication import SemanticDedupStage, semantic_dedup
from imgcurate.stages.embedding import ImageEmbeddingStage, embed
from imgcurate.stages.hash_dedup import ExactDedupStage, PerceptualDedupStage, exact_dedup, perceptual_dedup
from imgcurate.stages.nsfw import ImageNSFWFilterStage, score_nsfw
from imgcurate.stages.quality import ImageQualityFilterStage, score_quality
from imgcurate.stages.reading import FilePartitioningStage, ImageReaderStage
from imgcurate.stages.rules import Rule, ValueRule
from imgcurate.stages.writer import ImageWriterStage, write_webdataset
from imgcurate.stages.zero_shot import ImageZeroShotFilterStage, score_zero_shot

__all__ = [
    "ColumnFilterStage",
    "DatasetStage",
    "ExactDedupStage",
    "FilePartitioningStage",
    "ImageAestheticFilterStage",
    "ImageCaptionFilterStage",
    "ImageEmbeddingStage",
    "ImageNSFWFilterStage",
    "ImageQualityFilterStage",
    "ImageReaderStage",
    "ImageWriterStage",
    "ImageZeroShotFilterStage",
    "PerceptualDedupStage",
    "ProcessingStage",
    "Rule",
    "SemanticDedupStage",
    "Stage",
    "ValueRule",
    "Worker",
    "embed",
    "exact_dedup",
    "perceptual_dedup",
    "score_aesthetic",
    "score_captions",
    "score_nsfw",
    "score_quality",
    "score_zero_shot",
    "semantic_dedup",
    "write_webdataset",
]
