// Device guards for builds of torch without CUDA and MPS: torch asks them which device and stream is the present one.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {

template <DeviceType kind>
struct Pretended final : public NoOpDeviceGuardImpl<kind> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return Device(kind, 0); }
  Device exchangeDevice(Device) const override { return Device(kind, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(kind, 0)); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, Device(kind, 0)); }
};

using PretendedCuda = Pretended<DeviceType::CUDA>;
using PretendedMps = Pretended<DeviceType::MPS>;
C10_REGISTER_GUARD_IMPL(CUDA, PretendedCuda)
C10_REGISTER_GUARD_IMPL(MPS, PretendedMps)

}  // namespace c10::impl
