"""A program of its own: both stages of a checkpoint by the code that it ships, `AutoModel(trust_remote_code=True)`.

    python hub_code.py MODEL REVISION REQUEST.json ANSWER.safetensors

It imports nothing of this package, so that it runs under any Python that has torch and transformers: the published
models' code was written for transformers 4.48. REQUEST: token ids of `documents` and of `texts`, and `corpus_size`.
ANSWER: `first_stage` (documents, hidden_size), `second_stage` (texts, hidden_size), float32; the context are the
documents' rows, repeated up to corpus_size.
"""

import json
import sys
from pathlib import Path


def main(name: str, revision: str, request: str, answer: str) -> None:
    import torch  # noqa: PLC0415 - behind the change of sys.path below
    import transformers  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    model = transformers.AutoModel.from_pretrained(name, revision=revision or None, trust_remote_code=True)
    model = model.eval().float()

    def inputs(ids: list[int]) -> dict[str, "torch.Tensor"]:
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}

    with torch.no_grad():
        rows = torch.cat([model.first_stage_model(**inputs(ids)) for ids in asked["documents"]])
        repeated = rows[[i % len(rows) for i in range(asked["corpus_size"])]]
        vectors = [model.second_stage_model(**inputs(ids), dataset_embeddings=repeated) for ids in asked["texts"]]
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}"
    arrays = {"first_stage": rows.float().contiguous(), "second_stage": torch.cat(vectors).float().contiguous()}
    save_file(arrays, answer, {"made_by": made_by})


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    # What lies beside this file is not what the checkpoint's code means by its imports.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    main(*sys.argv[1:])
