"""Support package of the course "Llama 3.1 70B with FSDP + QLoRA on two 24 GB GPUs".

One idea a module, imports in one direction. The ground floor imports nothing of ours: `course`, `chat`, `data`, `prep`,
`follow`, `hybrid`, `plots`, `failures`. Above it: `shapes`, `report`, `tiny`, `memory_items` and on it `memory`,
`loading`, `preflight`, `saving`, `glance`, `refusing`, `launch`, `rehearsal`, `provenance`. On top: `runner` and the
command line, `python -m nbutils`.
"""
