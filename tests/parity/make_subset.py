"""Cut the small golden subset that the project carries out of a whole golden folder.

    python tests/parity/make_subset.py ../shared/reference/golden-a tests/parity/data/golden-subset

The subset holds one synchronizer of each side and the noise schedule: what fits into one megabyte. Parts
whose weights it lacks stay random and are not asked.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = (
    "mm_decoder.layers.0.llama_cross_attn.",
    "image_decoder.decoder.mmfs_module.mmfs_mid_block.",
)
OUTPUTS = (
    "mmfs_llm.single.layer0.",
    "mmfs_llm.decode.layer0.",
    "mmfs_sd.n1_mid.",
    "schedule.",
)
INPUTS = ("mmfs_llm.single.", "mmfs_llm.decode.", "mmfs_sd.n1_mid.", "mmfs_sd.pool_i8.")


def main(whole: Path, subset: Path) -> None:
    subset.mkdir(parents=True, exist_ok=True)
    weights = load_file(whole / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k.startswith(WEIGHTS)}, subset / "model.safetensors")
    inputs = load_file(whole / "inputs.safetensors")
    kept = {k: v for k, v in inputs.items() if k.startswith(INPUTS)}
    save_file(kept, subset / "inputs.safetensors")
    outputs = {k: v for k, v in load_file(whole / "outputs.safetensors").items() if k.startswith(OUTPUTS)}
    save_file(outputs, subset / "outputs.safetensors")
    tolerances = json.loads((whole / "tolerances.json").read_text())
    (subset / "tolerances.json").write_text(json.dumps({k: tolerances[k] for k in outputs}, indent=1))
    config = json.loads((whole / "config.json").read_text())
    config["meta"] = {k: v for k, v in config["meta"].items() if k == "mmfs_sd.n1_mid"}
    (subset / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
