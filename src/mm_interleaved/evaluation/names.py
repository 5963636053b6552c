"""What `evaluate` knows, by name; loads nothing, so that the help can list it."""

OWN = ("storyworld",)
PAPER = (
    "coco", "flickr30k", "nocaps", "paragraphs",
    "vqav2", "okvqa", "textvqa", "vizwiz", "gqa",
    "visdial",
    "refcoco", "refcoco+", "refcocog",
    "coco-images", "lncoco-images", "ade20k",
    "vist", "pororosv", "flintstonessv",
    "seed-bench", "pope",
)  # fmt: skip
INTERLEAVED = (
    "opening", "isg-bench", "mmie", "comm", "vistorybench", "ueval", "weave", "interleavedbench", "intersyn",
)  # fmt: skip
TASK_NAMES = (*OWN, *PAPER, *INTERLEAVED)
