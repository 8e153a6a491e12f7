// A guard for CUDA devices that does nothing: torch's CPU build has none, and indexing a tensor that says it is on CUDA asks for it.
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
}
