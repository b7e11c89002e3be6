"""Plan of a network: lowering, memory, binding to implementations, report."""
