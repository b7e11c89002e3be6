"""Pipeline folders of diffusers: reading and writing."""
