from lq.atomic import write_file, write_text  # noqa: F401
