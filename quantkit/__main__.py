"""`quantkit`, and `python -m quantkit`."""

from quantkit.cli import making, using
from quantkit.cli.group import main

for command in (
    making.make,
    making.calibrate,
    making.sensitivity,
    making.plan,
    making.hardware,
    making.quantize,
    making.status,
    making.recipes,
    using.inspect,
    using.families,
    using.verify,
    using.certify,
    using.export_kt,
    using.report,
    using.run,
    using.serve,
    using.publish,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
