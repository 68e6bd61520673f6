"""The ladder: climbs from BF16 to the most aggressive MX configuration that ships, each rung judged by its gate.

``rungs`` says what is tried, as data; ``climb`` runs it; ``child`` starts the harness; ``state`` is what a killed
ladder goes on from; ``show`` and ``command`` speak to the user.
"""
