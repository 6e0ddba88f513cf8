"""What verl loads by the entry point `verl.plugins` when it is imported: it acts on import, as verl calls nothing."""

from rlhf_fast.integrations.verl import install

install()
