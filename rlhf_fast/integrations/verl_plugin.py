"""Act on import: verl loads this module by the entry point `verl.plugins` when it is imported, and calls nothing.

verl hides an error of a plugin, so it is logged here.
"""

import logging

try:
    from rlhf_fast.integrations.verl import install

    install()
except Exception as error:
    logging.getLogger("rlhf_fast").warning("rlhf_fast: verl keeps its own functions: %r", error)
