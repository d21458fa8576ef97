"""Images found by rewards as targets: the manifest that ``sft`` trains on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot_fast.runtime.files import write_jsonl, write_safetensors
from oneshot_fast.runtime.seeds import gaussian

MANIFEST = Path("training") / "manifest.jsonl"


def write_training_pairs(
    folder: Path, rows: Sequence[Mapping[str, Any]], noise_shape: Sequence[int]
) -> int:
    """Pair every base noise of an optimize run with the best image that was found from it.

    Training on these pairs (``sft --manifest_path FOLDER/training/manifest.jsonl``) teaches the
    generator to give at once what the search took its steps for. With ``--method best_of_n`` that
    is best-of-K (RAFT, Dong et al. 2023, arXiv 2304.06767), with a gradient method it amortises the
    optimisation. The optimised noises themselves would teach nothing: the generator already maps
    them to these images.

    Returns:
        Number of pairs; ``rows`` without an image in ``folder`` are left out, and without any pair
        nothing is written.
    """
    shards: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if (folder / row["target_image_path"]).is_file():
            shards.setdefault(Path(row["noise_path"]).name, []).append(row)
    home, written = folder / MANIFEST.parent, []
    for name, found in shards.items():
        eps = gaussian([row["first_seed"] for row in found], noise_shape)
        write_safetensors(home / "noises" / name, {"z": eps}, {})
        written += [
            {
                "id": row["id"],
                "prompt": row["prompt"],
                "target_image_path": f"../{row['target_image_path']}",
                "noise_path": f"noises/{name}",
                "noise_index": k,
                "seed": row["first_seed"],
            }
            for k, row in enumerate(found)
        ]
    if written:
        write_jsonl(folder / MANIFEST, written)
    return len(written)
