"""All fuzzers, by name."""

from fuzz import adapter_files, gguf_files, model_files, tensor_files, texts
from fuzz.target import Target

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        *tensor_files.TARGETS,
        *gguf_files.TARGETS,
        *texts.TARGETS,
        *model_files.TARGETS,
        *adapter_files.TARGETS,
    )
}
