"""`python -m fusepass fusions`: what is registered."""


def fusions() -> None:
    """List the registered fusions, in the order in which they are tried."""
    from rich.console import Console
    from rich.table import Table

    import fusepass

    table = Table("name", "what becomes one op", "default", box=None, pad_edge=False)
    for fusion in fusepass.fusions():
        table.add_row(fusion.name, fusion.summary, "on" if fusion.default else "off")
    Console().print(table)
