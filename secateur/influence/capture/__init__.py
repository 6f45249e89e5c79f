"""Where and how contributions are captured.

`call_trace` watches a forward pass, `layouts` finds along which dimension the samples lie, `sites`
chooses the modules at whose calls contributions are captured, and `own_forward` captures a module
of no known layer family. `alone_check` compares captured contributions with those of samples that
run alone.
"""
