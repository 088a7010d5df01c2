"""The options of every config group: YAML files that Hydra composes.

Importing this package registers the schemas that they name, so that Hydra's own
`initialize_config_module("lunaris.conf")` and `compose("train", [...])` work.
"""

from lunaris.config.compose import schema_nodes
from lunaris.config.hydra_internals import register_schemas

register_schemas(schema_nodes())
