"""`quantkit`, and `python -m quantkit`."""

from quantkit.cli import making, running, stages, using
from quantkit.cli.group import main

for command in (
    making.make,
    stages.calibrate,
    stages.sensitivity,
    making.plan,
    making.hardware,
    stages.quantize,
    making.status,
    making.recipes,
    using.inspect,
    using.families,
    using.verify,
    using.certify,
    using.evaluate,
    using.compare,
    using.export_kt,
    using.report,
    running.run,
    running.serve,
    using.publish,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
