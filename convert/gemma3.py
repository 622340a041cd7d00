"""Names of Gemma 3's tensors: Gemma 2's and the norms of q and k; inside a model that sees, under another prefix."""

from jaxft.convert import gemma2, qwen3

NAMES = (*gemma2.NAMES, *qwen3.HEAD_NORMS)

# the text part of Gemma3ForConditionalGeneration
MULTIMODAL = tuple(name._replace(hf=name.hf.replace("model.", "model.language_model.", 1)) for name in NAMES)
# how older files, which are most, begin the same names
OLDER = (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."))
VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
