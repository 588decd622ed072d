"""Help texts of the tools' command lines."""

import argparse


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of each option that has one and does not tell of it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default == float("inf")
        if none or "default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)
