"""What pictures are judged by: readers, alignment with captions, metrics, and the report.

| to know | call |
|---|---|
| what a picture shows | `reader.read`, `reader.read_emoji` |
| whether it shows what a caption states | `alignment.aligned` |
| how far two sets of pictures are apart | `metrics.frechet_distance` and its kin |
| the figures of a card | `report` |
"""

from t2ilearn.judging.reader import load_reader

__all__ = ["load_reader"]
