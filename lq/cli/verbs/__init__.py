"""The verbs of the `lq` command. Each is one library call; these files read arguments and print."""

from lq.cli.app import register
from lq.cli.meshed import on_mesh
from lq.cli.verbs.experiments import demo, run
from lq.cli.verbs.memory import plan_memory
from lq.cli.verbs.planning import allocate, search
from lq.cli.verbs.quantizing import quantize
from lq.cli.verbs.reporting import list_, report, version
from lq.cli.verbs.scoring import score
from lq.cli.verbs.using import eval_, generate

# In the order in which `lq --help` lists them.
VERBS = (demo, run, score, allocate, quantize, search, eval_, generate, plan_memory, report, list_, version)
for verb in VERBS:
    register(on_mesh(verb) if verb in (run, score, quantize, search, eval_, generate) else verb)
