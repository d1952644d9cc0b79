"""Support package of the course "Llama 3.1 70B with FSDP + QLoRA on two 24 GB GPUs".

One idea a module, imports in one direction. The ground floor imports nothing of ours: `chat`, `data`, `tiny`, `prep`,
`hybrid`, `plots`, `failures`, `progress`. Above it: `report`, `loading`, `preflight`, `saving`, `glance`, `refusing`,
`launch`, `rehearsal`. On top: `runner` and the command line, `python -m nbutils`.
"""
