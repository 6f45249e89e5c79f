"""What happens in a run: plain functions of an opened run, in rooms whose imports only go down."""
